"""The objects that methods are made of. `conf/<part>/*.yaml` chooses a class of `parts/<part>.py`.

Each part is constructed from its settings alone and checks them; a method then gives it the models that it works on.
"""
