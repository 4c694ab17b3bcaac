"""From the scores of weights to masks: what ranks the weights, and the steps in which they are zeroed."""
