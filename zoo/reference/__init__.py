"""The reference VLM: a small vision-language model that is put together, trained and examined here.

No package carries a vision-language model, so this one is assembled from two that packages do carry and a small trained
part (``assembly``), learns (``lessons``, ``training``) to answer exact questions (``questions``) about canvases of real
pictures (``canvases``), and is examined on pictures that it has never seen (``examination``).

``zoo.load_model("reference-vlm")`` loads it; ``zoo reference`` trains, examines and shows.
"""
