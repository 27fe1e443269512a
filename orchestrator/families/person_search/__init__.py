"""Person search: where in a frame are people, and where else is this one?

Rooms: recipe.py (groups), data.py (tables of frames, boxes and who is searched where), batches.py (what training
sees), training.py (networks, task losses), search.py (one pass over the gallery, and its scores), job.py (needs,
training, scoring), pictures.py.
"""
