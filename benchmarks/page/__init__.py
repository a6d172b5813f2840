"""Results to a page and charts; nothing is measured here."""
