"""The site of docs/: its pages that are made from other files (mkdocs.yml names the modules)."""
