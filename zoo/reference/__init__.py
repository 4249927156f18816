"""Reference models that no package carries: put together here from packaged models and a small trained part.

The VLM (``assembly``) learns (``lessons``, ``training``) to answer exact questions (``questions``) about canvases of
real pictures (``canvases``), and is examined on pictures that it has never seen (``examination``). The image classifier
(``classifier``) is an encoder with a linear ``probe``. Both are put together once (``keeping``).

``zoo.load_model("reference-vlm")`` and ``zoo.load_model("dinov2-small-cifar10")`` load them; ``zoo reference`` trains,
examines and shows.
"""
