"""Mined positives for a person to judge: before training by numbers, in training by pictures.

survey.py    what a frozen CLIP finds alike in one's data, and the thresholds that follow;  show.py  says and draws it
promoted.py  the pairs that a run promoted, drawn as it trains
"""
