"""The objects that methods are composed of. `conf/<part>/*.yaml` chooses a class of `parts/<part>.py`.

The constructor of a part takes its settings alone and checks them. `attach` then gives it the models that it needs.
"""
