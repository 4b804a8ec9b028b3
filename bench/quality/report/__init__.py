"""Tables and the page of an evaluation."""
