"""Weight formats that Core ML can hold: what each costs, and how a matrix gets there."""
