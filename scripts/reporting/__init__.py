"""Results -> what people look at: report files, the HTML page, pictures.

Comes in: report entries, images and label maps as arrays. Goes out: JSON, CSV, HTML and PNG files. May use: runtime.
"""
