#pragma once

#include <CLI/CLI.hpp>
#include <optional>
#include <string>

#include "dualpipe/error.hpp"
#include "options.hpp"

namespace example {

/// The command line of a program that trains: the flags of all such programs, and those that it adds itself.
class CommandLine {
 public:
  /// @param options  with the program's defaults; it outlives this.
  CommandLine(const std::string& description, Options& options);

  /// Heading of the flags that are added next.
  void group(std::string name) { group_ = std::move(name); }
  template <class T>
  CLI::Option* flag(const std::string& name, T& value, const std::string& type, const std::string& text) {
    return app_.add_option(name, value, text)->type_name(type)->group(group_);
  }
  /// A number of things. The help shows its default, an error its range.
  template <class T>
  CLI::Option* count(const std::string& name, T& value, const std::string& text, int least = 1) {
    return flag(name, value, "N", text)->check(CLI::Range(least, 1'000'000).description(""));
  }
  CLI::Option* number(const std::string& name, double& value, const std::string& text, double most = 1e6) {
    const auto in_range = [most](const std::string& given) {  // CLI11's own range lets NaN pass
      double number = 0;
      const bool fits = CLI::detail::lexical_cast(given, number) && number >= 0 && number <= most;
      return fits ? std::string() : dualpipe::detail::str("Value ", given, " not in range [0 - ", most, "]");
    };
    return flag(name, value, "X", text)->check(CLI::Validator(in_range, ""))->capture_default_str();
  }

  /// Reads the arguments, and the configuration file if they name one, into the options.
  ///
  /// @return  the help, where that was asked for.
  /// @throws dualpipe::InvalidArgument  an unknown flag, a value out of range, a file that does not read.
  std::optional<std::string> parse(int argc, const char* const* argv);

 private:
  void add_text();
  void add_pipeline();
  void add_model();
  void add_training();
  void add_output();

  CLI::App app_;
  Options& options_;
  std::string group_;
  std::string config_;
  std::optional<std::string> schedule_, publish_;
  std::string device_ = "cpu", dtype_ = "float32";
  std::optional<int> micro_batches_, chunks_;
  bool shard_optimizer_ = false;
  double latency_milliseconds_ = 0;
  double megabytes_per_second_ = 0;
};

}  // namespace example
