"""Person search that is trained on boxes alone: what its methods share.

Frames, boxes and the search itself are those of :mod:`orchestrator.families.person_search`.
"""
