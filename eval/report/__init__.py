"""A folder of results as one page that needs nothing else, and that page served as results land.

In comes a folder that evaluations append to; out goes HTML with tables and pictures in it, which
Vega-Lite redraws as one filters. Drawing is an optional extra: `pip install 'llm-coreml[report]'`.
"""
