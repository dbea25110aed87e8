"""What a run is told: its sections, read from a recipe, a YAML file and overrides."""
