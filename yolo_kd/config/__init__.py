"""What a person can write: keys of the command line, YAML files and recipes, read into validated objects."""
