"""The mathematics: tensors and masks in, scalars on the graph out.

`objective.METHODS` is the table of objectives. `transport`, `alignment` and `relation` hold METHOD's three terms as
functions (weights are modules), `stable` what keeps all of them in float32 and finite. Nothing here knows where
hidden states come from: a live teacher and a cached one look the same.
"""
