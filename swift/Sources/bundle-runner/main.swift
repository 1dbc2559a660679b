// bundle-runner BUNDLE ID ID ...: measures a bundle on a Mac, and prints the report.
// Not yet run: no Apple device was at hand.

import BundleRunner
import Foundation

let words = CommandLine.arguments.dropFirst()
let prompt = words.dropFirst().compactMap { Int64($0) }
guard let folder = words.first, !prompt.isEmpty, prompt.count == words.count - 1 else {
  FileHandle.standardError.write(Data("Give the folder of a bundle, and tokens.\n".utf8))
  exit(2)
}
do {
  let bundle = try LanguageBundle(folder: URL(fileURLWithPath: folder))
  let report = try Report.measure(bundle, prompt: prompt, count: 64)
  FileHandle.standardOutput.write(try report.json() + Data("\n".utf8))
} catch {
  FileHandle.standardError.write(Data("'\(folder)' cannot be run: \(error)\n".utf8))
  exit(7)
}
