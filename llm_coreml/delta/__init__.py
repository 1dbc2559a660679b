"""What one bundle has that another one lacks, as a folder.

In: two bundles, of which one is there already wherever the other is wanted. Out: a folder with the
difference of their files, and from it and the first bundle the second one, byte by byte. What a
delta says is believed of nothing: `delta_record.py` bounds it, `applying.py` counts what it makes.
"""
