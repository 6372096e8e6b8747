// dualpipe-run: starts the ranks of a program on this machine and watches over them. Never loads LibTorch: it forks.
#include "tools/run/launcher.hpp"

#include <fcntl.h>

#include <cerrno>
#include <exception>
#include <iostream>
#include <system_error>

#include "tools/standard_streams.hpp"

int main(int argc, char** argv) {
  using namespace dualpipe::run;
  if (!dualpipe::open_standard_streams(O_RDWR)) {
    std::cerr << "dualpipe-run: cannot open /dev/null in place of a closed standard stream\n";
    return 1;
  }
  try {
    int exit_code = 0;
    const std::optional<Options> options = parse_command_line(argc, argv, exit_code);
    if (options) return launch(*options);
    if (std::cout.flush()) return exit_code;
    std::cerr << "dualpipe-run: standard output cannot be written\n";
    return 1;
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
