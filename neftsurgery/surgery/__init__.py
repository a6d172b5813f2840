"""The verbs over files: diff, extract, apply, revert, verify, inspect. Each plans, then executes."""
