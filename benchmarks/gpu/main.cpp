// What a device has to show, one line of JSON for each question; scripts/gpu-check asks all of them.
//
//   dualpipe-bench-gpu versions   # needs no device
//   dualpipe-bench-gpu host       # host time and calls of CUDA per op
//   dualpipe-bench-gpu hidden     # hidden share of transfers, by kernels and by the report
//   dualpipe-bench-gpu waiting    # cost of a receive that waits
//
// Without a device, or where NCCL does not let two ranks share one, it prints why and ends with exit code 77.
#include <CLI/CLI.hpp>
#include <exception>
#include <iostream>
#include <map>
#include <string>

#include "measures.hpp"

using namespace dualpipe::bench;

int main(int argc, char** argv) {
  const std::map<std::string, nlohmann::json (*)()> measures = {
      {"versions", versions}, {"host", host_time}, {"hidden", hidden_share}, {"waiting", waiting_receive}};
  CLI::App app{"Measures of one GPU, as JSON"};
  std::string what;
  app.add_option("what", what, "versions, host, hidden or waiting")->required()->check(CLI::IsMember(measures));
  CLI11_PARSE(app, argc, argv);
  try {
    std::cout << measures.at(what)() << std::endl;
    return 0;
  } catch (const Skipped& reason) {
    std::cout << nlohmann::json{{"skipped", reason.what()}} << std::endl;
    return 77;
  } catch (const std::exception& error) {
    std::cerr << "dualpipe-bench-gpu " << what << ": " << error.what() << std::endl;
    return 1;
  }
}
