"""Reference applications: a first-order optimizer and the same one behind K-FAC, on images.

images, digits      what is learned from
batches             in which order, and how it is varied: a pure function of seed and epoch
models              what learns
contestants         how it is optimised
loop                one contestant's training, an epoch at a time, resumable at each
record              what happened, as JSON, with machine, versions and seed
target, report      what it means: a table and a plot
comparison          all contestants and seeds, one after another
"""
