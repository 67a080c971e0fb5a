"""Writes a compressed model as an ONNX file with QuantizeLinear and DequantizeLinear, checked in ONNX Runtime.

In the order of a run: expressible.py (what ONNX has nodes for), sample.py (the call that is traced), modules.py (codes
in place of weights), program.py (torch's exporter), graph.py and output_grids.py (what runtimes need to compute in
integers), runtime.py (the check), write.py (the folder).
"""
