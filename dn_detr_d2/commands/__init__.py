"""What the program ``dn-detr`` runs: one module a verb, each with ``parse_arguments`` and ``main``."""
