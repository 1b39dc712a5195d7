"""Systems, protocols, measures and tables."""
