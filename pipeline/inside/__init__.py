"""What a pipeline call hides, as data: tokens, templates, batches, modules, one step of the model.

Each view is a function that returns plain data classes; `draw_text` and `draw_model` put them on a screen.
"""
