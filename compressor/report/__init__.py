"""A record as tables, model card and page, from plain JSON."""
