"""What a trained model says of single pairs: is its reward calibrated, which labels look wrong, what is learned out.

`table` scores pairs, `rules` reads the table and names rows, `saved` loads a finished run for both.
"""
