"""What two ops use unchanged: the choice of implementation, the dropout mask, the checks at the door."""
