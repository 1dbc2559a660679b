"""Which format each matrix gets: by flags, by an earlier plan, or by what each costs the model."""
