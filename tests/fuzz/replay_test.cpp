// Runs a target over its corpus and over seeded mutations of it, for compilers without libFuzzer, and on every machine
// the same.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "fuzz/allocations.hpp"
#include "fuzz/target.hpp"

namespace dualpipe::fuzz {
namespace {

namespace fs = std::filesystem;

constexpr unsigned seed = 20;
constexpr int rounds = 4000;

// Linear in the input: the readers keep a few words per token, and the targets write and draw what was read.
constexpr std::size_t base_bytes = std::size_t{4} << 20, bytes_per_byte = 4000;

struct Input {
  std::string name, text;
};

std::vector<Input> corpus() {
  std::vector<Input> inputs;
  for (const auto& entry : fs::directory_iterator(DUALPIPE_CORPUS)) {
    std::ifstream file(entry.path(), std::ios::binary);
    std::ostringstream text;
    text << file.rdbuf();
    inputs.push_back({entry.path().filename().string(), std::move(text).str()});
  }
  std::sort(inputs.begin(), inputs.end(), [](const Input& a, const Input& b) { return a.name < b.name; });
  return inputs;
}

void replay(const std::string& text, const std::string& name) {
  const std::size_t bound = base_bytes + bytes_per_byte * text.size();
  try {
    const Allocations used = allocations_of(
        [&] { LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(text.data()), text.size()); });
    EXPECT_LE(used.peak_bytes, bound) << name << ", " << text.size() << " bytes:\n" << text.substr(0, 2000);
  } catch (const std::exception& error) {
    ADD_FAILURE() << name << ": " << error.what() << "\n" << text.substr(0, 2000);
  }
}

class Mutator {
 public:
  Mutator(const std::vector<Input>& inputs, unsigned seed_value) : inputs_(inputs), random_(seed_value) {}

  std::string operator()() {
    std::string text = pick(inputs_).text;
    for (std::size_t changes = 1 + below(4); changes > 0; --changes) change(text);
    return text;
  }

 private:
  std::size_t below(std::size_t bound) { return bound == 0 ? 0 : random_() % bound; }

  template <class Range>
  typename Range::const_reference pick(const Range& range) {
    return range[below(range.size())];
  }

  void change(std::string& text) {
    static constexpr std::array<const char*, 22> tokens = {",",    "\n",  "\r\n",  ";",          "(",
                                                           ")",    "[",   "]",     "{",          "}",
                                                           "\"",   "0F0", "1B1",   "0I0",        "(0F1;1B0)OVERLAP_F_B",
                                                           "-1",   "0",   "1e999", "2147483648", "18446744073709551616",
                                                           "null", "\xff"};
    const std::size_t at = below(text.size() + 1), length = below(std::min<std::size_t>(text.size() - at, 64) + 1);
    switch (below(6)) {
      case 0:
        if (at < text.size()) text[at] = static_cast<char>(below(256));
        break;
      case 1:
        text.erase(at, length);
        break;
      case 2:
        text.insert(at, text.substr(below(text.size() + 1), length));
        break;
      case 3:
        text.insert(at, pick(tokens));
        break;
      case 4:
        text.replace(at, length, pick(tokens));
        break;
      default: {
        const std::string& other = pick(inputs_).text;
        text = text.substr(0, at) + other.substr(below(other.size() + 1));
      }
    }
  }

  const std::vector<Input>& inputs_;
  std::mt19937 random_;
};

TEST(Replay, Corpus) {
  const std::vector<Input> inputs = corpus();
  ASSERT_FALSE(inputs.empty()) << "no corpus in " DUALPIPE_CORPUS;
  for (const Input& input : inputs) replay(input.text, input.name);
}

TEST(Replay, MutatedCorpus) {
  const std::vector<Input> inputs = corpus();
  ASSERT_FALSE(inputs.empty());
  Mutator mutated(inputs, seed);
  for (int round = 0; round < rounds && !HasFailure(); ++round)
    replay(mutated(), "round " + std::to_string(round) + " of seed " + std::to_string(seed));
}

}  // namespace
}  // namespace dualpipe::fuzz
