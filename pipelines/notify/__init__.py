"""Messages to the outside on failure, refusal, promotion and drift, each delivered at most once."""
