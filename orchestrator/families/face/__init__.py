"""Face recognition: is this the same person?

Rooms: recipe.py (groups), data.py (tables of faces and of who is compared with whom), batches.py (what training sees),
heads.py (margin softmax over class centres, spread over workers), training.py (networks and the task), verify.py (one
pass over every verification set, and its scores), public_teacher.py, job.py (needs, training,
scoring), pictures.py.
"""
