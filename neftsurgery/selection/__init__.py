"""Which neurons are chosen: scores files, budgets, policies, selections."""
