// Runs a package of AOTInductor where only libtorch is, on float32 numbers: run_packages PACKAGE SIZE... <input >output
#include <ATen/ops/from_blob.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <iostream>
#include <iterator>
#include <string>
#include <vector>

int main(int count, char** arguments) {
  try {
    torch::inductor::AOTIModelPackageLoader package(arguments[1]);
    std::vector<int64_t> sizes;
    for (int index = 2; index < count; ++index) sizes.push_back(std::stoll(arguments[index]));
    std::vector<char> bytes{std::istreambuf_iterator<char>(std::cin), {}};
    const at::Tensor output = package.run({at::from_blob(bytes.data(), sizes)})[0].contiguous();
    std::cout.write(static_cast<const char*>(output.const_data_ptr()), output.nbytes());
  } catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << '\n';
    return 1;
  }
}
