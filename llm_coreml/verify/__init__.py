"""Is the written file the model, and is it precise enough?"""
