"""Context set -> weights that suit it: tuned on its pairs for some minutes, and kept only if they win.

In: a predictor with its context set. Out: a folder with weights and a report; the predictor's network has the weights.
May use: checkpoint, data, inference, runtime, training.
"""
