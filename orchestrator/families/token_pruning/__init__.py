"""Person re-identification with transformers that drop tokens.

Rooms: recipe.py (groups), networks.py (student and teacher of a recipe), job.py (needs, training, scoring),
views.py (what training sees), pictures.py.
"""
