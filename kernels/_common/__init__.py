"""What ops share unchanged: dispatch, operator definition, argument checks, the dropout mask, Triton launches."""
