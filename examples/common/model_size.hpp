#pragma once

namespace example {

struct ModelSize {
  int layers = 14;  ///< transformer blocks
  int width = 64;
  int heads = 4;
  int context = 64;    ///< longest text the model sees at once, in bytes
  double dropout = 0;  ///< share of what each branch gives, and of the embedding, that training leaves out
};

/// @throws dualpipe::InvalidArgument  a size below 1, or a width that the heads do not divide into even parts.
void check(const ModelSize& size);

}  // namespace example
