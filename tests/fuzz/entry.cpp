#include "fuzz/target.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  dualpipe::fuzz::read({reinterpret_cast<const char*>(data), size});
  return 0;
}
