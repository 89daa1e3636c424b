"""What the user asks for: recipes and targets as YAML in, frozen and checked settings out."""
