"""The live side: chosen neurons of a torch model, trained or swapped while everything else stays."""
