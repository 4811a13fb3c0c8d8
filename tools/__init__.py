"""The command line of the project; every file is a program."""
