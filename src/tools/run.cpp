// dualpipe-run: starts the ranks of a program on this machine and watches over them. Never loads LibTorch: it forks.
#include "tools/run/launcher.hpp"

#include <cerrno>
#include <exception>
#include <iostream>
#include <system_error>

int main(int argc, char** argv) {
  using namespace dualpipe::run;
  try {
    int exit_code = 0;
    const std::optional<Options> options = parse_command_line(argc, argv, exit_code);
    return options ? launch(*options) : exit_code;
  } catch (const std::system_error& error) {
    std::cerr << "dualpipe-run: " << error.what() << "\n";
    // As shells do.
    if (error.code().value() == ENOENT) return 127;
    return error.code().value() == EACCES ? 126 : 1;
  } catch (const std::exception& error) {
    std::cerr << "dualpipe-run: " << error.what() << "\n";
    return 1;
  }
}
