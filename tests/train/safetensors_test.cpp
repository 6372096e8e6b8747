// Safetensors files: what is written is read again, Python's package writes and reads the same, and everything else is
// refused by name.
#include "dualpipe/train/safetensors.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include "error_of.hpp"
#include "launch/process.hpp"
#include "temporary_folder.hpp"

namespace dualpipe {
namespace {

using test::error_of;
using ::testing::AllOf;
using ::testing::HasSubstr;

using Named = std::map<std::string, at::Tensor>;

/// As tensors() in safetensors.py.
Named same_as_python() {
  const auto made = [](at::ScalarType dtype, std::vector<std::int64_t> sizes) {
    std::int64_t count = 1;
    for (const auto size : sizes) count *= size;
    const std::int64_t first = dtype == at::kByte ? 0 : -(count / 2);
    return torch::arange(first, first + count).to(dtype).reshape(sizes);
  };
  return {{"f64", made(at::kDouble, {2, 3})},
          {"f32", made(at::kFloat, {5})},
          {"f16", made(at::kHalf, {1, 3, 1})},
          {"i64", made(at::kLong, {})},
          {"i32", made(at::kInt, {4})},
          {"i16", made(at::kShort, {3})},
          {"i8", made(at::kChar, {7})},
          {"u8", made(at::kByte, {3})},
          {"empty", made(at::kFloat, {0, 4})},
          {"a name with spaces, ü and \"quotes\"", made(at::kFloat, {2})},
          {"bool", torch::tensor({false, true, false})}};
}

void expect_tensors(const SafetensorsFile& file, const Named& expected) {
  EXPECT_EQ(file.tensors().size(), expected.size());
  for (const auto& [name, tensor] : expected) {
    const at::Tensor found = file.read(name);
    EXPECT_EQ(found.scalar_type(), tensor.scalar_type()) << name;
    EXPECT_TRUE(torch::equal(found, tensor)) << name << "\n" << found;
    EXPECT_EQ(file.tensors().at(name), (SafetensorsFile::Entry{tensor.scalar_type(), tensor.sizes().vec()})) << name;
  }
}

std::string bytes_of(const std::filesystem::path& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

/// A file of this header.
std::string with_length(const std::string& header, const std::string& data = "") {
  std::string length(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) length[i] = static_cast<char>(header.size() >> (8 * i) & 0xff);
  return length + header + data;
}

TEST(Safetensors, WhatIsWrittenIsReadAgain) {
  const test::TemporaryFolder folder;
  const std::string path = (folder / "model.safetensors").string();
  Named tensors = same_as_python();
  tensors["bf16"] = torch::randn({3, 2}).to(at::kBFloat16);
  tensors["transposed"] = torch::randn({3, 2}).t();
  tensors["trained"] = torch::randn({2}).requires_grad_();
  write_safetensors(path, tensors, {{"key", "värde"}});
  const SafetensorsFile file(path);
  expect_tensors(file, tensors);
  EXPECT_EQ(file.metadata(), (std::map<std::string, std::string>{{"key", "värde"}}));
  write_safetensors(path, {});
  expect_tensors(SafetensorsFile(path), {});
}

TEST(Safetensors, PythonReadsAndWritesTheSame) {
  const test::TemporaryFolder folder;
  const std::string ours = (folder / "ours").string(), theirs = (folder / "theirs").string();
  testing::Process writer({DUALPIPE_PYTHON, SAFETENSORS_SCRIPT, "write", theirs});
  const int code = writer.wait();
  if (code == 77) GTEST_SKIP() << writer.out();
  ASSERT_EQ(code, 0) << writer.err();
  const SafetensorsFile file(theirs);
  expect_tensors(file, same_as_python());
  EXPECT_EQ(file.metadata().at("made"), "by Python");

  Named tensors = same_as_python();
  tensors["bf16"] = torch::ones({2}, at::kBFloat16);
  write_safetensors(ours, tensors, {{"made", "by the test"}});
  testing::Process reader({DUALPIPE_PYTHON, SAFETENSORS_SCRIPT, "check", ours});
  EXPECT_EQ(reader.wait(), 0) << reader.err();
}

TEST(Safetensors, TensorsAreAlignedWithinTheFile) {
  const test::TemporaryFolder folder;
  const std::string path = (folder / "file").string();
  write_safetensors(path, {{"a", torch::zeros({3}, at::kByte)}, {"b", torch::zeros({3}, at::kDouble)}});
  const std::string text = bytes_of(path);
  EXPECT_EQ(static_cast<unsigned char>(text[0]) % 8, 0);
  EXPECT_THAT(text, HasSubstr(R"("b":{"dtype":"F64","shape":[3],"data_offsets":[0,24]})"));
  EXPECT_THAT(text, HasSubstr(R"("a":{"dtype":"U8","shape":[3],"data_offsets":[24,27]})"));
}

TEST(Safetensors, AFileThatIsCutOffOrTooLongIsRefused) {
  const test::TemporaryFolder folder;
  const std::string path = (folder / "file").string();
  write_safetensors(path, {{"weight", torch::ones({4, 2})}, {"bias", torch::ones({4}, at::kLong)}});
  const std::string whole = bytes_of(path);
  for (std::size_t length = 0; length < whole.size(); ++length) {
    const std::string part = folder.write("part", whole.substr(0, length));
    EXPECT_THAT(error_of([&] { SafetensorsFile file(part); }), HasSubstr(part)) << length << " bytes";
  }
  const std::string longer = folder.write("longer", whole + "x");
  EXPECT_THAT(error_of([&] { SafetensorsFile file(longer); }),
              AllOf(HasSubstr("too long"), HasSubstr("64"), HasSubstr("65")));
}

TEST(Safetensors, WhatTheFormatDoesNotAllowIsRefused) {
  const test::TemporaryFolder folder;
  const auto error = [&](const std::string& text) {
    const std::string path = folder.write("file", text);
    return error_of([&] { SafetensorsFile file(path); });
  };
  const auto header = [&](const std::string& text, const std::string& data = "") {
    return error(with_length(text, data));
  };
  EXPECT_THAT(error(std::string("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10)), HasSubstr("100000000"));
  EXPECT_THAT(header("[]"), HasSubstr("begins with {"));
  EXPECT_THAT(header("{"), HasSubstr("not JSON"));
  EXPECT_THAT(header(R"({"a":1})"), AllOf(HasSubstr("\"a\""), HasSubstr("dtype, shape and data_offsets")));
  EXPECT_THAT(header(R"({"a":{"dtype":"F8_E5M2","shape":[1],"data_offsets":[0,1]}})", "x"),
              AllOf(HasSubstr("\"a\""), HasSubstr("F8_E5M2"), HasSubstr("BF16")));
  EXPECT_THAT(header(R"({"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}})", "x"), HasSubstr("[-1]"));
  EXPECT_THAT(header(R"({"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}})", "x"), HasSubstr("[1.0]"));
  EXPECT_THAT(header(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,1]}})", "x"),
              AllOf(HasSubstr("takes 2 bytes"), HasSubstr("are 1")));
  EXPECT_THAT(header(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}})", "x"), HasSubstr("[1,0]"));
  EXPECT_THAT(header(R"({"a":{"dtype":"F64","shape":[4611686018427387904,4],"data_offsets":[0,1]}})", "x"),
              HasSubstr("more than any file"));
  EXPECT_THAT(header(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})", "xx"), HasSubstr("hole"));
  EXPECT_THAT(header(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                     R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
                     "xxx"),
              AllOf(HasSubstr("\"b\""), HasSubstr("overlap")));
  EXPECT_THAT(header(R"({"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},)"
                     R"("a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})"),
              HasSubstr("twice"));
  EXPECT_THAT(header(R"({"__metadata__":{"a":1}})"), HasSubstr("strings only"));
}

TEST(Safetensors, WhatCannotBeReadOrWrittenIsNamed) {
  const test::TemporaryFolder folder;
  const std::string path = (folder / "file").string();
  EXPECT_THAT(error_of([&] { SafetensorsFile file(path); }), AllOf(HasSubstr(path), HasSubstr("No such file")));
  EXPECT_THAT(error_of([&] { SafetensorsFile file(folder.path().string()); }), HasSubstr("no regular file"));
  write_safetensors(path, {{"a", torch::ones({1})}});
  EXPECT_THAT(error_of([&] { SafetensorsFile(path).read("b"); }), AllOf(HasSubstr(path), HasSubstr("no tensor b")));
  const auto write_error = [&](const at::Tensor& tensor) {
    return error_of([&] { write_safetensors(path, {{"a", tensor}}); });
  };
  EXPECT_THAT(write_error({}), AllOf(HasSubstr("tensor a"), HasSubstr("undefined")));
  EXPECT_THAT(write_error(torch::eye(2).to_sparse()), HasSubstr("not dense"));
  EXPECT_THAT(write_error(torch::zeros({1}, at::kComplexFloat)), HasSubstr("complex"));
  EXPECT_THAT(error_of([&] { write_safetensors(path, {{"__metadata__", torch::ones({1})}}); }),
              HasSubstr("__metadata__"));
  EXPECT_THAT(error_of([&] { write_safetensors(path, {{"\xff", torch::ones({1})}}); }), HasSubstr("UTF-8"));
  EXPECT_THAT(error_of([&] { write_safetensors(path + "/file", {}); }),
              AllOf(HasSubstr(path), HasSubstr("Not a directory")));
  expect_tensors(SafetensorsFile(path), {{"a", torch::ones({1})}});
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1) << "nothing is left behind";
}

}  // namespace
}  // namespace dualpipe
