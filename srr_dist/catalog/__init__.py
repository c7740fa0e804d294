"""The zoo: many models under many recipes, each a run of its own, and one page that shows them all.

entries  a zoo file -> its entries, each a complete and validated run
queue    entries -> processes: order, limits, stops
results  what is finished, from storage alone
index    index.json and index.html
"""
