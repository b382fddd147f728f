"""Results -> what people look at: report files, the HTML page, pictures.

In: report entries, images and label maps as arrays. Out: JSON, CSV, HTML and PNG files.
May use: runtime.
"""
