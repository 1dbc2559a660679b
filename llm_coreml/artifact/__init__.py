"""Files as data: containers, plans, programs and weights are read here, and nothing runs."""
