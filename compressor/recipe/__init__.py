"""YAML → recipe; every mistake with its place."""
