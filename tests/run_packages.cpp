// Runs packages of AOTInductor where only libtorch is. Takes pairs of files, a package and a pickled pair of its input
// and output; tells for each whether the package gives that output, or on the error stream why it does not run.
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iostream>
#include <iterator>

int main(int count, char** arguments) {
  for (int index = 1; index < count; index += 2) {
    try {
      torch::inductor::AOTIModelPackageLoader package(arguments[index]);
      std::ifstream file(arguments[index + 1], std::ios::binary);
      const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
      const auto tensors = torch::jit::pickle_load(bytes).toTuple();
      const at::Tensor output = package.run({tensors->elements()[0].toTensor()})[0];
      std::cout << (at::allclose(output, tensors->elements()[1].toTensor(), 1e-5, 1e-5) ? "yes\n" : "wrong\n");
    } catch (const c10::Error& error) {
      std::cerr << error.what_without_backtrace() << '\n';
      std::cout << "no\n";
    }
  }
}
