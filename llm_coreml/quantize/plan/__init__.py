"""Which format each matrix gets: by settings, by an earlier plan, or by what each costs the model.

In come a `Job` and the sizes of a model, and for mixed formats its weights and a text; out goes a
`QuantizationPlan`, held against shapes, target and system before any work is done.
"""
