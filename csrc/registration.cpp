// Names and schemas of the operators. The kernels register themselves in cpu/ and cuda/; gradients, shapes for tracing and
// autocast are in dn_detr_d2/layers/kernels.py.
#include <Python.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>

// Importing dn_detr_d2._C loads the library, which runs the registrations; there is nothing in the module itself.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

namespace {

// Device code in this library, as setup.py has told nvcc to make it: "sm_80,sm_90,compute_90"; "" if it did not say.
std::string cuda_architectures() {
#ifdef DN_DETR_CUDA_ARCHITECTURES
#define DN_DETR_TEXT(...) #__VA_ARGS__
#define DN_DETR_TEXT_OF(...) DN_DETR_TEXT(__VA_ARGS__)
  return DN_DETR_TEXT_OF(DN_DETR_CUDA_ARCHITECTURES);
#else
  return "";
#endif
}

// The PyTorch this was compiled against, and the devices it has kernels for.
std::string build_info() {
#ifdef DN_DETR_WITH_CUDA
  return "torch " TORCH_VERSION "; cpu cuda";
#else
  return "torch " TORCH_VERSION "; cpu";
#endif
}

} // namespace

TORCH_LIBRARY(dn_detr_d2, library) {
  library.def(
      "ms_deform_attn(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights)"
      " -> Tensor");
  library.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations,"
      " Tensor attention_weights) -> (Tensor, Tensor, Tensor)");
  library.def(
      "ms_deform_attn_fused(Tensor value, SymInt[] spatial_shapes, Tensor reference, Tensor sampling_offsets,"
      " Tensor attention_logits) -> Tensor");
  library.def(
      "ms_deform_attn_fused_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, Tensor reference,"
      " Tensor sampling_offsets, Tensor attention_logits, bool reference_requires_grad)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("build_info() -> str", build_info);
  library.def("cuda_architectures() -> str", cuda_architectures);
  library.def("cpu_capability(str? use=None) -> str");
}
