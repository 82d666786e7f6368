"""`distill cost`: published bills, the ledger of a run, when distilling pays."""
